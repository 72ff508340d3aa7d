"""Running an export on a device. Nothing here needs torch."""
