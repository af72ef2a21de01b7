"""The web page and its API; the only room with FastAPI. Needs the extra `[web]`."""
