"""The two small web applications: labelling and the reader study."""
