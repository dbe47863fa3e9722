"""Where images come from: data sets by name, their splits, transforms and loaders."""
