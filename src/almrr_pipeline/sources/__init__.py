"""Where pictures come from: data sets, a user's own folder, anomaly sources and the backbone's weights."""
