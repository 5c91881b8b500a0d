# The server, on a GPU where the container has one:
#   docker build -t v2l_fast .
#   docker run -e V2L_API_KEY=secret -p 8000:8000 -v v2l-store:/store v2l_fast
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY csrc_triton csrc_triton
COPY v2l_fast v2l_fast
RUN pip install --no-cache-dir -c constraints.txt ".[serve]"

RUN useradd --create-home v2l && mkdir /store && chown v2l /store
USER v2l
VOLUME /store
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# A key is required: the server refuses to listen on all addresses without one.
ENTRYPOINT ["v2l", "serve", "--host", "0.0.0.0", "--store", "/store"]
CMD ["--model", "shapes-any"]
