"""The planner's room. Nothing lives here yet; ARCHITECTURE.md says what will."""
