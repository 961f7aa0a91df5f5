"""A plugin that notes which trials it was told of: each in a line of its own, at once.

``WITNESS`` names the file. A line is one write to a file opened for appending, so that
a killed process leaves it whole or not there.
"""

import os

from autoprune.hookspecs import hookimpl


@hookimpl
def trial_finished(trial, run_dir):
    descriptor = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{run_dir.name} {trial.number}\n".encode())
    os.close(descriptor)
