"""Raw rows to problems, chat-formatted and tokenised rows."""
