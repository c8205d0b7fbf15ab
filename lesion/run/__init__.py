"""The ground that every command stands on: flags, files, run folders, device, saved state. It knows no lesion."""
