"""What every wing uses: errors, files, the console, addressed randomness, the check of settings."""
