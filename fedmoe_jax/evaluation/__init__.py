"""What a model is worth: to the server, to every client, to newcomers."""
