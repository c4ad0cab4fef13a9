"""heedful behind other libraries' interfaces, for code that is written against them; imported when asked for.

`hugging_face.HuggingFaceTokenizer` reads like `tokenizers.Tokenizer`, `tiktoken.TiktokenEncoding` like
`tiktoken.Encoding`. `flash_mla` and `deep_gemm` hold the functions of these names for DeepSeek Sparse Attention, over
torch tensors on a GPU or a CPU. None of the libraries is needed, and `import heedful` imports none of this.
"""
