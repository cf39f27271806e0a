"""Tables, pictures and HTML pages that show what a run did; import its modules directly."""
