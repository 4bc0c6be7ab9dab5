"""Numbers that others published, each with its source and address, to be shown beside ours and never among them."""
