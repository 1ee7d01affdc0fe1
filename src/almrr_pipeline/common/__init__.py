"""Images, files, progress, errors and record keeping that every other package uses."""
