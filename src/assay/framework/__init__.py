"""What commands are made of: settings classes as options, files and variables; help and output."""
