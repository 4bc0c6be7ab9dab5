"""What can be swept or searched: plain data and pure functions, standard library only."""
