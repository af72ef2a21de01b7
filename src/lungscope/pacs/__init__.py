"""A node in a PACS: films come in by C-STORE, results go out by C-STORE or STOW-RS. The one room with pynetdicom."""
