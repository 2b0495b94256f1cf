"""Which families of transformers the tests run through regard, and which it must refuse.

Enters: nothing. Leaves: model types by the way they are driven. `python tests/tiny_models.py` says what others lack.
"""

COVERED: dict[str, list[str]] = {
    "audio": ("data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wav2vec2-conformer ").split(),
    "causal": (
        "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bert-generation biogpt bitnet "
        "cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge "
        "dots1 dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 flex_olmo flint "
        "fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified "
        "gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo "
        "gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid "
        "granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax "
        "inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 "
        "lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax "
        "minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama modernbert-decoder moshi "
        "nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 "
        "phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text "
        "qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma "
        "youtu zaya "
    ).split(),
    "encoder": (
        "albert bert camembert data2vec-text distilbert electra ernie esm esmc eurobert gte "
        "jina_embeddings_v3 layoutlm mobilebert modernbert modernvbert nomic_bert roberta "
        "roberta-prelayernorm roc_bert ultrabert ultravbert xlm-roberta xlm-roberta-xl xmod "
    ).split(),
    "multimodal": (
        "aria audioflamingo3 aya_vision cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 "
        "florence2 glm4v_moe glm_ocr glmasr hyperclovax_vision_v2 idefics2 idefics3 internvl janus kimi_k25 "
        "kosmos-2.5 lfm2_vl lfm3_vl lighton_ocr llava llava_next llava_next_video llava_onevision minicpm_ocr "
        "minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 moss_transcribe_diarize muse_glimmer "
        "musicflamingo ovis2 paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl qwen3_asr "
        "qwen3_vl qwen3_vl_moe shieldgemma2 smolvlm video_llama_3 video_llava vipllava voxtral "
    ).split(),
    "seq2seq": (
        "bart blenderbot blenderbot-small encoder-decoder longt5 m2m_100 marian mbart mt5 nllb-moe pegasus "
        "pegasus_x plbart switch_transformers t5 t5gemma t5gemma2 umt5 "
    ).split(),
    "speech": ("moonshine speech_to_text whisper ").split(),
    "text": (
        "clip_text_model dpr embedding_gemma2 embedding_gemma2_text glm4v_moe_text glm4v_text glm_image_text "
        "glm_ocr_text granite_docling_text higgs_audio_v2 markuplm mistral_large4_text molmo2_text "
        "muse_glimmer_text muse_spark_text openai_privacy_filter qwen2_5_vl_text qwen2_vl_text "
        "qwen3_vl_moe_text qwen3_vl_text splinter tipsv2_text_model "
    ).split(),
    "two-sided": ("aimv2 altclip chinese_clip clip clipseg metaclip_2 owlv2 owlvit siglip tipsv2 ").split(),
    "video": ("videomae vivit ").split(),
    "vision": (
        "aimv2_vision_model beit chinese_clip_vision_model clip_vision_model data2vec-vision deit dinov2 "
        "dinov2_with_registers dinov3_vit dpt idefics3_vision ijepa internvl_vision mlcd mlcd_vision_model "
        "pixio pixtral qianfan_ocr_vision radio sam3_vision_model sam3_vit_model sam_hq_vision_model "
        "sam_vision_model sapiens2 segformer siglip_vision_model smolvlm_vision swin tipsv2_vision_model vit "
        "vit_mae vit_msn yolos "
    ).split(),
}

# They compute attention by themselves, and transformers cannot send it anywhere.
REFUSED = (
    "big_bird bigbird_pegasus bloom canine codegen convbert cpmant cvt deberta deberta-v2 donut-swin "
    "fastspeech2_conformer flaubert flava fsmt funnel got_ocr2 gpt_neox_japanese granite_speech "
    "granite_speech_plus groupvit hiera ibert imagegpt led longformer luke megatron-bert mobilevit mpnet mpt "
    "mra mvp nystromformer openai-gpt perceiver pp_chart2table prophetnet pvt_v2 rembert roformer rwkv sew-d "
    "speecht5 squeezebert swiftformer tapas timesformer trocr visual_bert vitdet wavlm xglm xlm xlnet yoso "
).split()

# Nothing in them could be sent to regard.
WITHOUT_ATTENTION = (
    "bit falcon_mamba fnet focalnet mamba mobilenet_v1 mobilenet_v2 poolformer regnet resnet textnet "
).split()
