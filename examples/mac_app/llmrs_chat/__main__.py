from llmrs_chat.app import ChatApp

if __name__ == "__main__":
    ChatApp("llmrs Chat", "org.llmrs.llmrs-chat").main_loop()
