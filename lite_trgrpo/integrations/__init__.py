"""Our objective inside the engines of others, which run on many cards."""
