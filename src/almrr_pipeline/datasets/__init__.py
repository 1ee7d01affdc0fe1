"""Where images come from: data sets, a user's own folder, textures and the backbone's weights."""
