"""Why a plan keeps what it keeps."""
