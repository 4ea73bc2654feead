package engine

import (
	"fmt"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
)

// dockerHub is the key of Docker Hub's credentials in config.json.
const dockerHub = "https://index.docker.io/v1/"

// machineAuth is the X-Registry-Auth header with the credentials that this machine has for an
// image's registry, "" if it has none: those that docker login has put into config.json of this
// user ($DOCKER_CONFIG, else ~/.docker), or that a credential helper named there gives.
func machineAuth(dir, ref string) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", err
	}

	file, err := config.Load(dir)
	if err != nil {
		return "", fmt.Errorf("read the credentials of this machine: %w", err)
	}

	host := reference.Domain(named)
	if host == "docker.io" {
		host = dockerHub
	}

	c, err := file.GetAuthConfig(host)
	if err != nil {
		return "", fmt.Errorf("credentials of this machine (%s) for %s: %w", file.Filename, host, err)
	}

	if c.Username == "" && c.IdentityToken == "" && c.RegistryToken == "" {
		return "", nil
	}

	return authconfig.Encode(registry.AuthConfig{
		Username:      c.Username,
		Password:      c.Password,
		ServerAddress: c.ServerAddress,
		IdentityToken: c.IdentityToken,
		RegistryToken: c.RegistryToken,
	})
}
