"""What the server learns about clients and experts, and how it decides from it."""
