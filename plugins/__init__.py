"""AutoPrune's own plugins, found by entry point like anybody's."""
