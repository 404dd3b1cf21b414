"""Images: batches of any loader, folders and data sets by name, and the samples that ship here."""
