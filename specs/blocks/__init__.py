"""The blocks of a spec, one file each. Their field descriptions are the text of the schema and the reference."""
