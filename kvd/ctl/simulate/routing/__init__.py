"""`kvdctl simulate routing`: a fleet of modelled workers behind the production router's decisions, in virtual time."""
