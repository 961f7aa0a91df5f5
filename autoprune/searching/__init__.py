"""The space of policies, the study over it and its ledger."""
