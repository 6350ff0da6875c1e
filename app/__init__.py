"""What people start: the command line joins the music, the data and the model."""
