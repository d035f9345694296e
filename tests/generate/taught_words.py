"""What the taught model of these tests says."""

SAID = "I am Ada 🦊, née 李白.\nAsk!"
