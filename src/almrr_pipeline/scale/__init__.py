"""More than one process or machine: work side by side, Ray clusters, archives of images."""
