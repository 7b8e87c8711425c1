"""Writing files so that nothing half-written looks finished."""
