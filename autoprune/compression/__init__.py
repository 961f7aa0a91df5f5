"""Methods and the variants that they make: sweeps, storage, store and bank."""
