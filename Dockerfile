# docker build -t pith .  &&  docker run --rm -it pith
FROM debian:12-slim
WORKDIR /pith
COPY scripts/packages.txt scripts/packages.txt
RUN apt-get update \
    && sed 's/#.*//' scripts/packages.txt | awk 'NF { print $1 }' \
        | DEBIAN_FRONTEND=noninteractive xargs apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
COPY . .
RUN scripts/build.sh cpu pith
CMD ["scripts/quickstart.sh"]
