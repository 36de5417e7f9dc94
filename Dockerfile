FROM python:3.13-slim AS build
WORKDIR /src
COPY . .
# The gateway and everything that it needs, as wheels: the runtime image gets no compiler and no source tree.
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.13-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels quota-gateway
# A number, not a name: Kubernetes' runAsNonRoot can then see that it is not root.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid gateway --no-create-home --shell /usr/sbin/nologin gateway \
    && install --directory --owner gateway --group gateway --mode 0700 /data
USER 10001:10001
VOLUME /data
EXPOSE 8080 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["quota-gateway", "healthcheck"]
ENTRYPOINT ["quota-gateway"]
CMD ["serve", "--listen", "0.0.0.0:8080", "--admin-listen", "0.0.0.0:9090", "--data-dir", "/data"]
