"""What a run discloses of its clients, and what its defences guarantee."""
