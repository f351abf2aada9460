"""What the folder of a run holds, and how a stopped one goes on."""
