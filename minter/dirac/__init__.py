"""Per-file tokens of an unmodified DIRAC 9.1, by options of the CS alone.

    Systems
    {
      DataManagement
      {
        Agents
        {
          FTS3Agent
          {
            HandlerPath = minter/dirac/FTS3Agent
            UseTokens = True
            Minter
            {
              URL = https://tokens.example.org/vo/
              Client = dirac-prod
              SecretFile = /opt/dirac/etc/minter.secret
              CA = /etc/grid-security/certificates
              Away = wait            # or dirac, or x509: what is done while Minter is away
              lhcb                   # options of one VO come before those above
              {
                URL = https://tokens.example.org/lhcb/
              }
            }
          }
        }
      }
    }

SEs are switched one by one, by DIRAC's own option `TokenSupport = true`. A transfer goes with tokens of
Minter if all its SEs are switched; every other transfer goes as before. `WLCGTokenBasePath`, `IdProvider` and
the TokenManager are not needed for transfers with tokens of Minter.
"""
