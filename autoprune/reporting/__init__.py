"""Tables, fronts and plots of what was tried."""
