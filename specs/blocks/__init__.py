"""The blocks of a spec, a file each. What they say under each field is what the schema and the reference say."""
