"""The HTTP door: routes, schemas, server-sent events."""
