"""The machine that this runs on: paths, devices, several workers, energy."""
