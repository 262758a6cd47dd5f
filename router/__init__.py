"""The router: sends every request where it is answered soonest, and can say why. See ARCHITECTURE.md."""
