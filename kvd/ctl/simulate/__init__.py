"""`kvdctl simulate`: replays recorded workloads through the policies, in virtual time."""
