"""The layouts on disk that pictures come in, one file each."""
