"""The tokenizer behind the interfaces of other libraries, for code that is written against them.

`hugging_face.HuggingFaceTokenizer` reads like `tokenizers.Tokenizer`, `tiktoken.TiktokenEncoding` like
`tiktoken.Encoding`. Neither library is needed, and `import heedful` imports none of this.
"""
