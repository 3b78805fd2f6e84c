"""Models that others have trained, read into memkit's."""
