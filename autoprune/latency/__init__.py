"""What a policy costs in time: recorded, predicted, and how sure that is."""
