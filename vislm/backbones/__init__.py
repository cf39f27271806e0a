"""Vision backbones that plug in any attention: not built yet (see CHANGELOG)."""
