"""Images for models that see: opened, fetched, tiled, and their places in dialogs."""
