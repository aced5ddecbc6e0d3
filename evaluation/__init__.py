"""What a user of features cares about: homographies, poses and tracks, for any runtime."""
