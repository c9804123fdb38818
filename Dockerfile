FROM python:3.12-slim

RUN useradd --uid 10001 --create-home phi
WORKDIR /app
COPY requirements.txt phi_server.py ./
RUN grep onnxruntime requirements.txt | xargs pip install --no-cache-dir
USER phi

# The model is a volume: docker run -v ./model:/model:ro -e MODEL_PATH=/model ...; without one the demo model is fetched.
ENV SERVER_HOST=0.0.0.0 SERVER_PORT=8000 PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"SERVER_PORT\"]}/health', timeout=4)"]
CMD ["python", "phi_server.py"]
