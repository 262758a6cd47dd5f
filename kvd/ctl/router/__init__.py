"""What kvdctl asks of a router: where requests went, who the workers are, and that they change."""
